"""Reports on the finished runs of a matrix folder, and the tasks and models they are made with.
Only trainer/matrix.py and the command line call this room. It reads files of runs and loads no
model; results.py has its types.
"""
