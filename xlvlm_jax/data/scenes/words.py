"""The words of the captions: families of near-synonyms, with the weight of each.

In each table the first entry is the plain form and the most frequent; the others are what a person
might say instead. A concept read through the vocabulary shows such families, so each word of a
family belongs to a single attribute.
"""

from __future__ import annotations

# kind: {(singular, plural): weight}
NOUNS = {
    "dog": {
        ("dog", "dogs"): 20,
        ("puppy", "puppies"): 2,
        ("hound", "hounds"): 1,
        ("pup", "pups"): 1,
    },
    "cat": {("cat", "cats"): 16, ("kitten", "kittens"): 2, ("kitty", "kitties"): 2},
    "bird": {("bird", "birds"): 17, ("songbird", "songbirds"): 2, ("birdie", "birdies"): 1},
    "rabbit": {("rabbit", "rabbits"): 16, ("bunny", "bunnies"): 3, ("hare", "hares"): 1},
    "bus": {("bus", "buses"): 17, ("coach", "coaches"): 3},
    "train": {("train", "trains"): 16, ("locomotive", "locomotives"): 3},
    "car": {("car", "cars"): 16, ("automobile", "automobiles"): 2, ("sedan", "sedans"): 2},
    "boat": {("boat", "boats"): 16, ("sailboat", "sailboats"): 3, ("ship", "ships"): 1},
    "plane": {("plane", "planes"): 16, ("airplane", "airplanes"): 3, ("jet", "jets"): 1},
    "ball": {("ball", "balls"): 18, ("sphere", "spheres"): 1},
}

COLOUR_WORDS = {
    "red": {"red": 16, "crimson": 3, "scarlet": 3, "ruby": 1},
    "orange": {"orange": 16, "tangerine": 3, "amber": 3},
    "yellow": {"yellow": 16, "golden": 3, "lemon": 3},
    "green": {"green": 16, "emerald": 3, "jade": 3},
    "blue": {"blue": 16, "azure": 3, "cobalt": 3, "sapphire": 1},
    "purple": {"purple": 16, "violet": 3, "plum": 2, "lilac": 1},
    "black": {"black": 16, "ebony": 3, "inky": 2, "charcoal": 1},
    "white": {"white": 16, "ivory": 3, "pearly": 2, "milky": 1},
}

# "{a}" is "a" or "an", depending on the next word; the phrases of two and three take the plural.
QUANTIFIERS = {
    1: {"{a}": 16, "one": 1, "a single": 2, "a lone": 2, "a solitary": 1},
    2: {"two": 16, "a pair of": 3, "a couple of": 2, "a duo of": 1},
    3: {"three": 16, "a trio of": 3, "a group of three": 2},
}
TOGETHER = {
    1: {"alone": 3, "by itself": 2, "on its own": 1},
    2: {"side by side": 3, "together": 2, "next to each other": 1},
    3: {"together": 3, "in a group": 2, "in a crowd": 1},
}
SIZES = {
    1: {"big": 3, "large": 2, "huge": 1},
    2: {"matching": 2, "identical": 1},
    3: {"small": 3, "little": 2, "tiny": 1},
}
QUALITIES = {
    "dog": {"cute": 2, "furry": 2, "loyal": 1},
    "cat": {"cute": 2, "furry": 2, "stripy": 1},
    "bird": {"cute": 2, "feathered": 2, "plump": 1},
    "rabbit": {"cute": 2, "furry": 2, "fluffy": 1},
    "bus": {"tall": 2, "shiny": 2},
    "train": {"old": 2, "shiny": 2},
    "car": {"new": 2, "shiny": 2},
    "boat": {"wooden": 2, "shiny": 2},
    "plane": {"fast": 2, "shiny": 2},
    "ball": {"round": 3, "shiny": 2, "striped": 2},
}

MOOD_ADJECTIVES = {
    "happy": {"happy": 14, "cheerful": 3, "joyful": 3, "merry": 2, "glad": 1, "delighted": 1},
    "sad": {"sad": 14, "unhappy": 3, "gloomy": 3, "miserable": 2, "tearful": 2, "upset": 1},
}
# (participle, finite singular, finite plural)
MOOD_VERBS = {
    "happy": {
        ("smiling", "smiles", "smile"): 7,
        ("grinning", "grins", "grin"): 4,
        ("laughing", "laughs", "laugh"): 3,
        ("beaming", "beams", "beam"): 2,
    },
    "sad": {
        ("crying", "cries", "cry"): 7,
        ("weeping", "weeps", "weep"): 4,
        ("sobbing", "sobs", "sob"): 3,
        ("frowning", "frowns", "frown"): 3,
    },
}
# (one, several)
MOOD_CLAUSES = {
    "happy": {
        ("with a big smile", "with big smiles"): 4,
        ("with a wide grin", "with wide grins"): 3,
        ("with a joyful face", "with joyful faces"): 2,
        ("full of joy", "full of joy"): 1,
    },
    "sad": {
        ("with tears in its eyes", "with tears in their eyes"): 4,
        ("with a gloomy face", "with gloomy faces"): 3,
        ("with a frown", "with frowns"): 2,
        ("in tears", "in tears"): 2,
        ("full of sorrow", "full of sorrow"): 1,
    },
}
MOOD_LOOKS = {"looks": "look", "seems": "seem", "feels": "feel"}

# kind: {(participle, finite singular, finite plural): weight}
ANIMAL_VERBS = {
    ("sitting", "sits", "sit"): 12,
    ("resting", "rests", "rest"): 2,
    ("waiting", "waits", "wait"): 2,
    ("posing", "poses", "pose"): 1,
}
VERBS = {
    "dog": ANIMAL_VERBS,
    "cat": ANIMAL_VERBS,
    "rabbit": ANIMAL_VERBS,
    "bird": {
        ("standing", "stands", "stand"): 12,
        ("perching", "perches", "perch"): 3,
        ("waiting", "waits", "wait"): 2,
    },
    "bus": {
        ("parked", "is parked", "are parked"): 10,
        ("stopping", "stops", "stop"): 3,
        ("driving", "drives", "drive"): 3,
    },
    "train": {
        ("standing", "stands", "stand"): 8,
        ("steaming", "steams", "steam"): 3,
        ("puffing", "puffs", "puff"): 3,
        ("chugging", "chugs", "chug"): 2,
    },
    "car": {
        ("parked", "is parked", "are parked"): 10,
        ("driving", "drives", "drive"): 4,
        ("cruising", "cruises", "cruise"): 2,
    },
    "boat": {
        ("floating", "floats", "float"): 8,
        ("sailing", "sails", "sail"): 4,
        ("anchored", "is anchored", "are anchored"): 3,
        ("drifting", "drifts", "drift"): 2,
    },
    "plane": {
        ("flying", "flies", "fly"): 12,
        ("gliding", "glides", "glide"): 2,
        ("soaring", "soars", "soar"): 2,
    },
    "ball": {
        ("lying", "lies", "lie"): 10,
        ("rolling", "rolls", "roll"): 3,
        ("bouncing", "bounces", "bounce"): 2,
    },
}
# What animals do only at one place.
PLACE_VERBS = {
    "beach": {("sunbathing", "sunbathes", "sunbathe"): 3, ("paddling", "paddles", "paddle"): 1},
    "street": {("strolling", "strolls", "stroll"): 3, ("loitering", "loiters", "loiter"): 1},
    "forest": {("hiding", "hides", "hide"): 3, ("camping", "camps", "camp"): 1},
    "snow": {("shivering", "shivers", "shiver"): 3, ("freezing", "freezes", "freeze"): 1},
    "field": {("grazing", "grazes", "graze"): 3, ("frolicking", "frolics", "frolic"): 1},
    "city": {("sightseeing", "sees the sights", "see the sights"): 3},
}

PLACE_PHRASES = {
    "beach": {
        "on the beach": 24,
        "on the sandy beach": 5,
        "at the beach": 3,
        "on the sand": 5,
        "on the shore": 3,
        "by the sea": 4,
        "near the waves": 3,
        "beside the ocean": 2,
        "at the seaside": 2,
        "near the palm": 2,
        "ashore": 1,
        "along the coast": 1,
    },
    "street": {
        "on the street": 24,
        "on the quiet street": 4,
        "along the street": 3,
        "on the road": 6,
        "on the asphalt": 2,
        "outside the houses": 4,
        "near the lamppost": 3,
        "by the sidewalk": 2,
        "beside the curb": 1,
        "along the roadside": 2,
        "past the houses": 2,
    },
    "forest": {
        "in the forest": 24,
        "in the shady forest": 4,
        "in the woods": 7,
        "among the trees": 5,
        "under the branches": 3,
        "beneath the leaves": 2,
        "between the trunks": 2,
        "among the mushrooms": 2,
        "in the woodland": 1,
        "deep in the woods": 2,
    },
    "snow": {
        "in the snow": 24,
        "in the cold snow": 4,
        "on the snow": 4,
        "in the snowy mountains": 4,
        "among the snowflakes": 4,
        "below the icy peaks": 3,
        "near the pines": 2,
        "in the frosty winter": 2,
        "amid snowdrifts": 2,
        "outside in winter": 1,
    },
    "field": {
        "in the field": 24,
        "in the grassy field": 5,
        "in the meadow": 7,
        "on the grass": 5,
        "among the flowers": 4,
        "near the barn": 3,
        "by the fence": 2,
        "amid the daisies": 2,
        "in the pasture": 1,
        "below the hills": 2,
        "on the farm": 1,
    },
    "city": {
        "in the city": 24,
        "in the big city": 4,
        "downtown": 4,
        "in the busy city": 3,
        "below the towers": 4,
        "near the skyscrapers": 4,
        "in the plaza": 2,
        "between the buildings": 3,
        "in front of the skyline": 2,
        "on the city square": 2,
    },
}
# Planes are above a place.
AIR_PHRASES = {
    "beach": {
        "over the beach": 20,
        "above the sea": 4,
        "above the waves": 3,
        "over the sand": 3,
        "along the coast": 2,
    },
    "street": {
        "over the street": 20,
        "above the road": 4,
        "above the houses": 4,
        "past the rooftops": 2,
    },
    "forest": {
        "over the forest": 20,
        "above the woods": 4,
        "above the trees": 4,
        "among the branches": 2,
    },
    "snow": {
        "over the snow": 20,
        "above the snowy mountains": 4,
        "past the icy peaks": 3,
        "among the snowflakes": 3,
    },
    "field": {
        "over the field": 20,
        "above the meadow": 4,
        "above the grass": 3,
        "past the barn": 2,
    },
    "city": {
        "over the city": 20,
        "above the skyscrapers": 4,
        "past the towers": 4,
        "above the skyline": 2,
    },
}
PLACE_NOUNS = {
    "beach": {"{a} sandy beach": 5, "{a} beach": 5, "{a} seashore": 1, "{a} sunlit shore": 1},
    "street": {"{a} quiet street": 5, "{a} street": 5, "{a} paved road": 1, "{a} row of houses": 1},
    "forest": {"{a} shady forest": 5, "{a} forest": 5, "{a} grove of trees": 1, "some woods": 1},
    "snow": {"{a} snowy mountain": 5, "{a} snowy landscape": 5, "{a} winter landscape": 2},
    "field": {"{a} grassy field": 5, "{a} field": 5, "{a} flowery meadow": 2, "{a} farm": 1},
    "city": {"{a} busy city": 5, "{a} city": 5, "{a} city skyline": 1, "some skyscrapers": 1},
}
# Said after the place itself.
PLACE_TAILS = {
    "beach": {
        "by the waves": 3,
        "near the sea": 2,
        "under the palm": 2,
        "with seashells": 1,
        "beside the surf": 1,
        "next to the ocean": 1,
    },
    "street": {
        "near the houses": 3,
        "by the lamppost": 2,
        "past the doors and roofs": 1,
        "next to the sidewalk": 2,
        "beside the pavement": 1,
    },
    "forest": {
        "under the trees": 3,
        "among the trunks": 2,
        "with fallen leaves": 1,
        "near the mushrooms": 2,
        "beneath the branches": 1,
        "between mossy trunks": 1,
    },
    "snow": {
        "near the mountains": 3,
        "under the snowflakes": 2,
        "by the pines": 2,
        "in the cold": 1,
        "below the frosty peaks": 1,
        "beside the fir trees": 1,
    },
    "field": {
        "near the barn": 3,
        "among the flowers": 2,
        "by the fence": 2,
        "in the grass": 1,
        "below the rolling hills": 1,
        "between daisies and blossoms": 1,
    },
    "city": {
        "near the towers": 3,
        "below the skyscrapers": 2,
        "beside the tall buildings": 2,
        "with its skyline": 1,
        "next to the offices": 1,
        "amid the urban bustle": 1,
    },
}
WEATHER_TAILS = {
    "sunny": {"on a sunny day": 3, "under a bright sun": 2, "in the sunshine": 1},
    "cloudy": {"on a cloudy day": 3, "under puffy clouds": 2, "beneath an overcast sky": 1},
    "clear": {"on a clear day": 3, "under a clear sky": 2, "under an open sky": 1},
}

# kind: {(one, several): weight}
PARTS = {
    "dog": {
        ("floppy ears", "floppy ears"): 4,
        ("a long tail", "long tails"): 2,
        ("a shiny nose", "shiny noses"): 2,
        ("a collar", "collars"): 2,
        ("soft paws", "soft paws"): 1,
        ("a big snout", "big snouts"): 1,
    },
    "cat": {
        ("long whiskers", "long whiskers"): 4,
        ("pointed ears", "pointed ears"): 3,
        ("a curly tail", "curly tails"): 2,
        ("soft paws", "soft paws"): 1,
        ("a striped head", "striped heads"): 1,
    },
    "bird": {
        ("a big beak", "big beaks"): 4,
        ("feathery wings", "feathery wings"): 3,
        ("a feather crest", "feather crests"): 1,
        ("thin legs", "thin legs"): 2,
        ("small claws", "small claws"): 1,
    },
    "rabbit": {
        ("long ears", "long ears"): 5,
        ("a fluffy tail", "fluffy tails"): 3,
        ("soft paws", "soft paws"): 1,
        ("a tiny nose", "tiny noses"): 1,
    },
    "bus": {
        ("many windows", "many windows"): 5,
        ("big wheels", "big wheels"): 3,
        ("an upper deck", "upper decks"): 2,
        ("seats for passengers", "seats for passengers"): 1,
    },
    "train": {
        ("a tall chimney", "tall chimneys"): 4,
        ("a wagon", "wagons"): 3,
        ("puffs of smoke", "puffs of smoke"): 3,
        ("iron wheels on rails", "iron wheels on rails"): 2,
        ("a steam engine", "steam engines"): 2,
    },
    "car": {
        ("round wheels", "round wheels"): 4,
        ("glass windows", "glass windows"): 2,
        ("closed doors", "closed doors"): 2,
        ("bright headlights", "bright headlights"): 2,
        ("rubber tires", "rubber tires"): 1,
    },
    "boat": {
        ("a tall mast", "tall masts"): 3,
        ("a big sail", "big sails"): 4,
        ("a wooden hull", "wooden hulls"): 3,
        ("a small flag", "small flags"): 2,
        ("portholes", "portholes"): 1,
    },
    "plane": {
        ("wide wings", "wide wings"): 4,
        ("small windows", "small windows"): 2,
        ("a cockpit", "cockpits"): 2,
        ("a pointed tail", "pointed tails"): 1,
        ("pilots inside", "pilots inside"): 1,
    },
    "ball": {
        ("curved stripes", "curved stripes"): 4,
        ("stripes", "stripes"): 3,
        ("a glossy surface", "glossy surfaces"): 2,
        ("a rubber skin", "rubber skins"): 1,
    },
}
# How the colour is said after the noun.
COATS = {
    "dog": {"with {colour} fur": 4, "with a {colour} coat": 2},
    "cat": {"with {colour} fur": 4, "with a {colour} coat": 2},
    "rabbit": {"with {colour} fur": 4, "with a {colour} coat": 2},
    "bird": {"with {colour} feathers": 4, "with {colour} plumage": 2},
}
THING_COAT = {"painted {colour}": 4, "in {colour}": 2}

PICTURES = {
    "a picture of": 4,
    "a drawing of": 2,
    "an image of": 1,
    "a cartoon of": 1,
    "a view of": 1,
}

# Words that say where a picture was taken; each belongs to one place.
PLACE_WORDS = {
    "beach": (
        "beach sandy sand shore sea seaside seashore waves ocean palm ashore coast seashells surf"
    ),
    "street": (
        "street road asphalt houses lamppost sidewalk curb roadside rooftops roofs pavement paved"
    ),
    "forest": "forest woods woodland trees trunks branches leaves mushrooms mossy grove",
    "snow": (
        "snow snowy snowflakes snowdrifts mountains mountain peaks icy pines frosty winter fir"
    ),
    "field": (
        "field grassy meadow grass flowers flowery barn fence daisies blossoms pasture hills farm"
    ),
    "city": "city downtown towers skyscrapers plaza buildings skyline urban offices",
}
