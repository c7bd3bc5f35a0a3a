"""Matrix factorisations on arrays: each method is a pair of pure functions and one shared loop."""
