"""Measures of an audit: how near a generated picture is to each training picture. One file each."""
