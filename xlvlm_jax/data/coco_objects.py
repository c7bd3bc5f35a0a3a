"""The 80 objects of COCO, and the words that captions use for them.

The same words as in CHAIR's own table (LisaAnne/Hallucination at 6e4d33c, data/synonyms.txt), which
has three that match nothing there: "motor bike" and "cheesecake" keep a leading space, "iPhone" its
capital.
"""

_TABLE = """
    person: adult, baby, baker, bicyclist, biker, boy, bride, buyer, caller, camper, chef,
        child, children, cop, cowboy, coworker, doctor, drinker, driver, father, female,
        foreigner, gentleman, girl, grandchild, groom, guy, hunter, kid, lady, male, man,
        mother, offender, officer, passenger, patient, people, pitcher, player, policeman,
        politician, rider, serviceman, shopper, sister, skateboarder, skater, skier,
        snowboarder, soldier, solider, student, teenager, thief, traveler, trespasser, villager,
        walker, woman, worker
    bicycle: bike, minibike, trike, unicycle
    car: automobile, cab, coupe, hatchback, jeep, limo, minivan, sedan, suv, taxi, taxicab, van
    motorcycle: moped, motor bike, motor cycle, motorbike, scooter
    airplane: air plane, airbus, aircraft, biplane, jet, jetliner, monoplane, plane, seaplane
    bus: minibus, trolley
    train: caboose, locomotive, tramway
    truck: firetruck, hauler, lorry, pickup
    boat: barge, battleship, canoe, catamaran, dinghy, ferry, ferryboat, freighter, houseboat,
        kayak, lifeboat, liner, motorboat, paddleboat, pontoon, powerboat, riverboat, rowboat,
        sailboard, sailboat, schooner, ship, skiff, speedboat, steamboat, steamship, trawler,
        tugboat, vessel, watercraft, yacht
    traffic light: stop light, stoplight, street light, streetlight, traffic signal
    fire hydrant: hydrant
    stop sign
    parking meter
    bench: pew
    bird: blackbird, bluebird, bluejay, buzzard, chickadee, cockatiel, cockatoo, condor,
        cormorant, cowbird, crow, duck, egret, falcon, finch, flamingo, fowl, goose, gosling,
        gull, heron, hummingbird, kingfisher, loon, lorikeet, macaw, magpie, mallard, oriole,
        osprey, ostrich, owl, parakeet, parrot, peacock, peafowl, pelican, pheasant, pigeon,
        puffin, quail, raven, robin, rooster, sandpiper, seabird, seagull, shorebird, songbird,
        sparrow, swan, turkey, vulture, warbler, waterbird, waterfowl, willet, woodpecker
    cat: feline, kitten, tabby
    dog: beagle, brindle, bulldog, canine, chihuahua, cocker, collie, corgi, dachshund,
        doberman, doggie, doggy, greyhound, hound, husky, labrador, mutt, pitbull, poodle, pug,
        pup, puppy, retriever, rottweiler, schnauzer, sheepdog, spaniel, terrier, weimaraner,
        whippet
    horse: bronc, bronco, clydesdale, colt, equine, foal, mare, mustang, palomino, pony,
        racehorse, stallion
    sheep: ewe, goat, lamb, ram
    cow: bison, buffalo, bull, calf, cattle, heifer, holstein, ox, oxen, zebu
    elephant
    bear: panda
    zebra
    giraffe
    backpack: knapsack
    umbrella
    handbag: briefcase, purse, wallet
    tie: bow, bow tie
    suitcase: luggage, suit case
    frisbee
    skis: ski
    snowboard
    sports ball: ball
    kite
    baseball bat
    baseball glove
    skateboard
    surfboard: longboard, shortboard, skimboard, wakeboard
    tennis racket: racket
    bottle
    wine glass
    cup
    fork
    knife: knive, pocketknife
    spoon
    bowl: container
    banana
    apple
    sandwich: burger, cheeseburger, hamburger, sub
    orange
    broccoli
    carrot
    hot dog
    pizza
    donut: bagel, doughnut
    cake: cheesecake, coffeecake, cupcake, pancake, shortcake
    chair: seat, stool
    couch: chesterfield, futon, loveseat, recliner, settee, sofa
    potted plant: houseplant
    bed
    dining table: desk, table
    toilet: commode, lavatory, potty, urinal
    tv: monitor, television, televison
    laptop: computer, laptop computer, lenovo, macbook, netbook, notebook
    mouse
    remote
    keyboard
    cell phone: cellphone, iPhone, mobile phone, phon, phone, smartphone, telephone
    microwave
    oven: stove, stove top oven, stovetop
    toaster
    sink
    refrigerator: freezer, fridge
    book
    clock
    vase
    scissors
    teddy bear: teddybear
    hair drier: hairdryer
    toothbrush
"""


def _parsed() -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    for line in _TABLE.replace("\n        ", " ").strip("\n").splitlines():
        name, _, others = line.strip().partition(": ")
        words[name] = (name, *filter(None, others.split(", ")))
    return words


WORDS = _parsed()  # object -> its words, the first its name
OBJECTS = tuple(WORDS)
OBJECT_OF = {word: name for name, words in WORDS.items() for word in words}
UNMATCHED = ("motor bike", "cheesecake", "iPhone")  # as CHAIR spells them
