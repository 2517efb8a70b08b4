"""The parts that `create.py` and `search.py` share; CONTRIBUTING.md says what is where."""
