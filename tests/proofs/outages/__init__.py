"""The database moves, lags, is cut off or restored, clocks are wrong, resources run out: nothing is lost or doubled.

`make test-outages` runs the short forms, `make proof-outages` the long ones. Both need root and packages of Debian's,
which `.ci/outages` installs.
"""
