"""The whole of it on the embedded model: `pipeline.run` makes a run directory with its page.

pipeline         draw, extract, factor, ground, score, and the parts below
shift_part       what fine-tuning does to the concepts
steering_part    a vector that turns answers
summary          `show`: what is told at the end
embedded         the small trained model, which ships with the package
"""
