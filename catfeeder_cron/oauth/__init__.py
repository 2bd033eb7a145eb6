"""The refresh grant of OAuth 2.0 (RFC 6749, section 6): what is sent to a provider, and what its answer means.

presets     what is known of well-known providers, one table of data
provider    one provider as it is to be asked: its database row, its preset and the configuration put together
request     a provider and a refresh token -> a request; no I/O
answers     the classes of answers, one for each thing that a caller does about them
reading     a response -> an answer; no I/O
quoting     a provider's words, made fit for a log
client      what is handed to those who need requests sent
session     requests over httpx, bounded in time and size

No OAuth library is used: several take an error inside a 200 for a token, and a client of theirs that is shared between
users was seen to hand one user's token to another. Nothing here remembers a user between two requests.
"""
