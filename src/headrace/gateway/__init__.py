"""HAProxy, and the router process that decides for it: SPOE agent, rendered config, runtime API.

The only place with HAProxy's words. Must not see a response token.
"""
