"""`pointsman demo`: every decider in turn, under the same arrivals, through a real Envoy.

Light on purpose: the modules behind the command are imported when it runs, so that
``pointsman --help`` stays fast.
"""
