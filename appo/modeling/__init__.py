"""The model as every room uses it: loading, rotary positions, attention, packing and vision features.

Below `training` and `evaluation`, which must see the same model for the same video; above nothing but torch and
transformers.
"""
