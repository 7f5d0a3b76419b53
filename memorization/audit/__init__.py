"""Auditing a fine-tune: which training pictures does it copy, and from which epoch on?"""
