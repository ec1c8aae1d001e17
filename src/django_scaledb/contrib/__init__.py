"""Other programs: each module needs its program, and nothing else imports it."""
