"""Run the due actions of the table "Actions"; several daemons share them by leases.

fair_order  reads the due rows, in an order in which neither a kind nor a user starves the others
tables      the tables as they are in this database: names, and how their columns hold times
leases      claims rows a few at a time, extends their leases, and takes rows over from dead processes
memory      remembers how attempts of this process ended
put_back    stores that again where the database has lost it
outcomes    stores the outcome of an attempt, if the row is still under its lease
unstored    keeps the outcomes of a run until they are stored, and then counts and logs them
fence       ends an attempt before its lease does, by this process's own clock
attempts    runs the attempts in an event loop with a thread of its own
handlers    calls a built-in handler in that event loop, or the operator's in a child process
run         one run of the job, which puts these together
"""
