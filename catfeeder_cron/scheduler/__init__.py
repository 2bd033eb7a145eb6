"""Brings a slot to a recorded run.

A slot goes one way: BackgroundTasks calls JobScheduler, JobSlots claims the slot in the Ledger, Executor makes the run
under a Supervisor, the job does its work, and the Listeners learn how the run ended.
"""
