"""Who writes texts, and what another model says of them. Knows no loss and no reward."""
