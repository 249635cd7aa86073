export PYTHONPATH=/opt/rackless
