"""Is a device slow, or wrong?"""
