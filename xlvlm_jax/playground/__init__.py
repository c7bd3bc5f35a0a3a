"""The playground: a local page on which a person steers a model and watches its answers change.

`items` are what it steers by, `settings` what a page asks for; `answers` runs the model, on the one
thread of `worker`; `server` speaks HTTP.
"""
