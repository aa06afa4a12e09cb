"""What travels between server and clients, read without trust.

Enters: Flower's messages, whatever their sender put into them. Leaves: arrays of the
declared names and shapes, or a code of a closed list; reading never raises and never
unpickles. `messages` holds all record keys of both directions, `encoding` the packed
forms. Must not import torch or transformers.
"""
