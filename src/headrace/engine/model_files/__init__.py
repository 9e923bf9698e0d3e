"""What a model's files say, without torch: where they are, and their metadata. Used by engine and front.

Must not know weights' arithmetic, requests, or processes.
"""
