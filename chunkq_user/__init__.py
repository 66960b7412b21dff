"""Package below which the user's files and their neighbors are modules, also in child processes.

A child process that unpickles an object of the user's code imports this package first, which
installs the finder of these modules. See `chunkq.job.user_modules`.
"""

from chunkq.job.user_modules import install

install()
