"""The kinds of RPC frames; docs/protocol.rst says what is in each."""

# Application to process.
CALL = 1  # arguments
STREAM = 2  # the same; the answers are items
OPTIONS = 3  # a string list, for the call of this id that follows
CANCEL = 4
CREDIT = 5  # uint32: so many items more
FDSTORE = 6  # id 0: two sockets, in which files of a captured call are kept
#: Added to CALL or STREAM: the payload is (arguments, keyword arguments).
KEYWORDS = 64

# Process to application.
READY = 16
RESULT = 17
ERROR = 18  # id 0: the process could not start
EVENT = 19
ITEM = 20
STOP = 21  # a stream has ended
RETIRE = 22
OUTPUT = 23  # what the call of this id has written, ahead of its answer

#: Items of a stream that may be on their way to the application.
WINDOW = 16
