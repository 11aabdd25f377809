"""One module for each kind of training text; sample.py has the contract."""
