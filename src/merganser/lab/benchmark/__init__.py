"""The benchmark: every method on every suite from one zoo, its options chosen once on development data of all suites.

merganser benchmark SUITE.yaml… --results DIR, then merganser report DIR -o page.html
"""
