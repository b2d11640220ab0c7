"""What a run is going to take: memory, disk and time, told before anything is read.

It may use ``run`` and what lies below, and looks at a model's settings alone. It must never load weights.
"""
