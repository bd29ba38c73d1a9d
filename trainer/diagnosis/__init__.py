"""Phase diagnose: the three traps of a teacher-student pair, measured with weights held still."""
