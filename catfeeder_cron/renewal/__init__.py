"""Renew OAuth tokens so that no received token is lost and none is renewed twice, however a process ends.

Many providers hand out a new refresh token with every renewal and take the use of the old one for theft. So a lost
answer or a second request logs a user out. Any number of processes may renew at the same time.

links            finds the rows of "ActiveOauths" that are due, and those of them that may be sent now
claims           step 1: claims a row under a lease, reads its refresh token under lock, and marks it as sent
provider_worker  step 2: sends the requests of one provider, a few at a time
circuit_breaker  decides when a run stops sending to a provider, and for how long
entries          an answer as a line in a file, and its age
journal          step 3: writes an answer to the local disk as soon as it arrives
kept_answers     finds stored answers again, for rows that hold a spent refresh token again
hosts            after a failover, waits until every host has put back its answers
batch_writer     stores the workers' results in batches while they come in
settlements      stores one such batch, and counts it
failures         records in the row that a request brought no token
storing          step 4: writes an answer into its row if the row still holds the token that was sent
recovery         stores the answers in the journals of dead processes, frees their leases, and puts answers back
providers        reads how each provider is asked; keeps pauses that every daemon sees and that outlive a restart
run              one run of the job: the workers of all providers together
summary          the run's counts and log entries
forecast         finds the links that will need a new login of their user
checks           the findings of `check` about the providers and the journal's directory
"""
