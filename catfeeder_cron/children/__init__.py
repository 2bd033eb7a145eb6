"""Code of the operator's (a job's `call`, an action's handler) in processes of its own, never in the daemon's.

pool        the side of the daemon: which process a call goes to, how long one is kept
process     one such process, as the daemon sees it: what is asked of it, what it answers, how it ends
guard       the first program in it: watches over the second, and lets nothing that it started survive it
worker      the second: calls the function
callables   finds "package.module:function"

The daemon starts the guard, which forks the worker before there is any thread. Messages are lines of JSON: calls come
in on the worker's standard input, verdicts and log records go out on what was its standard output, whatever is
printed comes by standard error. The guard has a pipe of its own on which the daemon sets its deadline; when that pipe
is closed, the daemon is gone.
"""
