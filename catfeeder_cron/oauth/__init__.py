"""The refresh grant of OAuth 2.0 (RFC 6749, section 6): send refresh requests to providers, and read their answers.

presets     defaults for well-known providers, in one table
provider    one provider's settings, put together from its database row, its preset and the configuration
request     builds a request from a provider and a refresh token; no I/O
answers     the classes of answers, one for each decision of a caller
reading     reads an answer from a response; no I/O
quoting     makes a provider's text fit for a log
client      opens sessions for callers
session     sends requests over httpx, with bounded time and size

This wing uses no OAuth library: several of them read an error inside a 200 as a token, and one whose client was shared
between users gave one user's token to another. Nothing here keeps data of a user between two requests.
"""
