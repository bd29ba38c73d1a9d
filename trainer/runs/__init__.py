"""What a run leaves behind: log, folder, card, numbers with intervals, tables, pictures. Knows no
model.
"""
