"""`make bench`: our figures beside those of others who do the same, measured in one run.

It prints what it measured and asserts nothing; what must hold is in the tests.
"""
