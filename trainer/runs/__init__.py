"""What a run leaves behind: its folder, log and model card; and what all rooms write results with:
statistics, JSON, tables, figures, progress. Nothing here knows a model or a phase.
"""
