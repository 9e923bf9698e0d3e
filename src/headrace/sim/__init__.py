"""A discrete-event run of the real decisions on a virtual clock, under faults (`python -m headrace.sim`).

Owns a world of simulated machines, processes, links and clients, what may break in it, and the checks that
must hold after every event. Nothing here serves anybody; nothing else imports it.
"""
