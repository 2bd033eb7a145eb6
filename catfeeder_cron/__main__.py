"""`python -m catfeeder_cron`."""

from catfeeder_cron.cli import main

main()
