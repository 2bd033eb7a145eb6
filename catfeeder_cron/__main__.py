"""`python -m catfeeder_cron`."""

from catfeeder_cron.console.cli import main

main()
