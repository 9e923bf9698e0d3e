"""The controller: desired and observed state to actions (a pure reconciler), and the shell around it.

Also the composition root: it builds the specs of all processes from the config.
"""
