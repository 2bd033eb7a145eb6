"""The operator's code (a job's `call`, an action's handler), which runs in other processes, never in the daemon's.

pool        in the daemon: which process a call goes to, and how long an idle process is kept
process     in the daemon: one such process, from its start to its end
messages    in the daemon: the call that goes to a worker, and the answers that come back
control     in the daemon: the guard's own pipe, by which it is given the deadline or told to kill
output      in the daemon: the lines that a callable prints
guard       the first program in the process: watches over the second, and lets nothing that it started survive it
worker      the second: calls the function
callables   finds "package.module:function"

The daemon starts the guard, which forks the worker before there is any thread. Messages are lines of JSON: calls come
in on the worker's standard input, verdicts and log records go out on the descriptor that was its standard output, and
printed lines come by standard error. The guard has a pipe of its own on which the daemon sets its deadline; when that
pipe is closed, the daemon is gone.
"""
