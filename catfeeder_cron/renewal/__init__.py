"""Renew OAuth tokens such that no received one is lost and none is renewed twice, however processes end.

Providers hand out a new refresh token with every renewal and take the use of the old one for theft, so a lost answer
or a second request logs a user out. Any number of processes may do this at once.

links            which rows of "ActiveOauths" are due, and may be asked for
claims           1. a row is claimed under a lease, its refresh token read again under lock, and marked as sent
provider_worker  2. the requests of one provider, a few at a time
circuit_breaker  when a provider is left alone, and for how long
journal          3. an answer is written to the local disk the moment it is there
batch_writer     what the workers hand in is stored in batches as it comes in
failures         what an answer without a token does to its row
storing          4. an answer goes into the row, if that still holds the token that was sent
recovery         what dead processes have left in their journals is stored, and their leases are freed
providers        who is asked and how; pauses that every daemon knows and that outlive a restart
run              one run of the job, the workers of all providers together
summary          what is told of it
forecast         which links will need a new login of their user
checks           what `check` says of providers and of the place for the journal
"""
