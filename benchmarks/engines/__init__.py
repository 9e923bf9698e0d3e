"""The native engine beside other engines: what each is started with, and what is measured of it.

Every engine serves the same model through its own OpenAI server, in an environment of its own under `.peers`,
with the same number of threads. Never a dependency of headrace.
"""
