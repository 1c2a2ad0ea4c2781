"""Measurements that anyone can repeat: whole commands, their time and their memory."""
