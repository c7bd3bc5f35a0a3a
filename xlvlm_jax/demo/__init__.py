"""The full pipeline on the embedded model: `pipeline.run` makes a run directory and its page.

pipeline         draws, extracts, decomposes, grounds, scores, and runs the parts below
shift_part       measures what fine-tuning does to the concepts
steering_part    fits and applies a vector that changes answers
summary          prints the results at the end
embedded         the small trained model that ships with the package
"""
