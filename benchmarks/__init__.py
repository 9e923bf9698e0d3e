"""Programs that measure headrace, beside peers where there are any, and write dated reports.

`python -m benchmarks NAME`. Not tests: their figures are of one machine and one day.
"""
