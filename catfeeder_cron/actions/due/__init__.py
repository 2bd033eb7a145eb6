"""Do what is due in the table "Actions", shared out between daemons by leases.

survey      which rows are due, in an order in which neither a kind nor a user starves the others
leases      rows are claimed, a few at a time, kept while their handlers run, and taken over from who died
outcomes    what became of an attempt: stored if the row is still ours
attempts    the handlers at work: built-in ones in an event loop, the operator's in processes of their own
shift       one run: puts these together
"""
