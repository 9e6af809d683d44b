"""What a BEV model is made of.

Letters: B frames, V cameras, I images (frames times cameras), n rows (points, pillars or voxels of all frames together),
k, m boxes, P pixels of all feature maps together, D depth bins, C channels or classes, h, w rows and columns of a feature
map, H, W of an image, X, Y, Z cells.
"""
