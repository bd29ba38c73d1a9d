"""Reports over finished runs, and the worlds they are made in. Nothing else imports this room."""
