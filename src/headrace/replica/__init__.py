"""The front of a replica: HTTP server, OpenAI routes, chat templates, text, streams, its engine process.

Must not know other replicas or the fleet's state.
"""
