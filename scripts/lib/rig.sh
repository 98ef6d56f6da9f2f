# shellcheck shell=bash
rig_cleanup() { :; }
