# cython: language_level=3, boundscheck=False, wraparound=False
"""Frames of MP's link and the pieces of downloads in them, hashed without the interpreter lock.

Documented in the plain twin, ``_plain/frames.py``.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from aoscore._speedups._crypto cimport (
    EVP_MD_CTX,
    EVP_DigestFinal_ex,
    EVP_DigestInit_ex,
    EVP_DigestUpdate,
    EVP_MD_CTX_free,
    EVP_MD_CTX_new,
    EVP_sha256,
)
from aoscore._speedups.frames_types import HEADER_BYTES, MAX_PAYLOAD_BYTES, MOST_TOGETHER

cdef extern from "_sha256pair.h" nogil:
    bint sha256_pair_is_there()
    void sha256_pair(
        const unsigned char *first,
        const unsigned char *second,
        size_t size,
        unsigned char *first_digest,
        unsigned char *second_digest,
    )

cdef bint PAIRS = sha256_pair_is_there()

cdef enum:
    HEADER = 40
    CHECKSUM = 8  # where it begins in the header
    DIGEST = 32
    MOST_PAYLOAD = 65536
    RECORD_HEADER = 5
    TOGETHER = 64  # frames that are hashed without the lock before something is done with them
    CONTENT = 0x0A
    REQUEST_ID = 0x08
    OFFSET = 0x10
    DATA = 0x1A

assert (HEADER, MOST_PAYLOAD, TOGETHER) == (HEADER_BYTES, MAX_PAYLOAD_BYTES, MOST_TOGETHER)


cdef struct Payload:
    size_t begin
    size_t size
    unsigned char digest[DIGEST]


cdef struct Piece:
    uint64_t request_id
    uint64_t offset
    const unsigned char *data
    size_t size


cdef uint32_t little32(const unsigned char *at) noexcept nogil:
    return at[0] | <uint32_t>at[1] << 8 | <uint32_t>at[2] << 16 | <uint32_t>at[3] << 24


cdef void put_little32(unsigned char *at, uint32_t value) noexcept nogil:
    at[0] = value & 0xFF
    at[1] = (value >> 8) & 0xFF
    at[2] = (value >> 16) & 0xFF
    at[3] = value >> 24


cdef class _Sha256:
    """A context that is used again and again: making one costs as much as hashing a small frame."""

    cdef EVP_MD_CTX *context

    def __cinit__(self):
        self.context = EVP_MD_CTX_new()
        if self.context == NULL or not EVP_DigestInit_ex(self.context, EVP_sha256(), NULL):
            raise MemoryError("libcrypto could not start a digest")

    def __dealloc__(self):
        EVP_MD_CTX_free(self.context)

    cdef bint of_all(self, const unsigned char *data, Payload *payloads, size_t count) noexcept nogil:
        """Take the digests of payloads in the data; whether they could be taken.

        Two neighbours of the same size at once where that can be: a download is full of them.
        """
        cdef size_t index = 0
        cdef Payload *one
        while index < count:
            one = payloads + index
            if PAIRS and index + 1 < count and one.size == one[1].size:
                sha256_pair(data + one.begin, data + one[1].begin, one.size, one.digest, one[1].digest)
                index += 2
                continue
            # Without a kind the context keeps its own.
            if not (
                EVP_DigestInit_ex(self.context, NULL, NULL)
                and EVP_DigestUpdate(self.context, data + one.begin, one.size)
                and EVP_DigestFinal_ex(self.context, one.digest, NULL)
            ):
                return False
            index += 1
        return True


cdef class FrameCutter:
    """Cuts the bytes of a transport into frames. Holds at most one incomplete frame."""

    cdef _Sha256 sha256
    cdef bytearray begun
    cdef readonly object refused

    def __init__(self):
        self.sha256 = _Sha256()
        self.begun = bytearray()
        self.refused = None

    @property
    def begun_bytes(self):
        """What is there of an incomplete frame."""
        return len(self.begun)

    def feed(self, data):
        """The frames that are complete with `data`, by runs of one channel: port and payloads.

        A frame whose checksum does not fit its payload is a run without payload. Payloads may be views of `data`.
        """
        cdef Py_buffer buffer
        cdef list runs = []
        if self.refused is not None:
            return runs
        whole = memoryview(data).cast("B")
        PyObject_GetBuffer(whole, &buffer, PyBUF_SIMPLE)
        try:
            self.cut(runs, whole, <const unsigned char *>buffer.buf, <size_t>buffer.len)
        finally:
            PyBuffer_Release(&buffer)
        return runs

    cdef int cut(self, list runs, whole, const unsigned char *data, size_t length) except -1:
        cdef Payload payloads[TOGETHER]
        cdef size_t position = 0, count, index, size
        cdef bint is_done
        if len(self.begun):
            # Only what the begun frame lacks is copied to it: most of the data is cut where it lies.
            position = self.fill(HEADER, whole, 0, length)
            if <size_t>len(self.begun) < HEADER or self.refuses(self.begun):
                return 0
            size = little32(<const unsigned char *>self.begun + 4)
            position = self.fill(HEADER + size, whole, position, length)
            if <size_t>len(self.begun) < HEADER + size:
                return 0
            payloads[0].begin, payloads[0].size = HEADER, size
            if not self.sha256.of_all(<const unsigned char *>self.begun, payloads, 1):
                raise MemoryError("libcrypto could not take a digest")
            add(runs, <const unsigned char *>self.begun, payloads, bytes(memoryview(self.begun)[HEADER:]))
            self.begun.clear()
        while True:
            with nogil:
                count = 0
                while count < TOGETHER and length - position >= HEADER:
                    size = little32(data + position + 4)
                    if size > MOST_PAYLOAD or length - position - HEADER < size:
                        break
                    payloads[count].begin, payloads[count].size = position + HEADER, size
                    position += HEADER + size
                    count += 1
                is_done = self.sha256.of_all(data, payloads, count)
            if not is_done:
                raise MemoryError("libcrypto could not take a digest")
            if count == 0:
                break
            for index in range(count):
                payload = whole[
                    <Py_ssize_t>payloads[index].begin : <Py_ssize_t>(payloads[index].begin + payloads[index].size)
                ]
                add(runs, data, payloads + index, payload)
        if length - position >= HEADER and self.refuses(whole[<Py_ssize_t>position:]):
            return 0
        if position < length:
            self.begun += whole[<Py_ssize_t>position:]
        return 0

    cdef bint refuses(self, header) except -1:
        """Whether the frame that begins here is one too large."""
        cdef const unsigned char[:] view = header
        cdef uint32_t size = little32(&view[4])
        if size <= MOST_PAYLOAD:
            return False
        self.refused = (little32(&view[0]), size)
        return True

    cdef size_t fill(self, size_t size, whole, size_t position, size_t length) except? 0:
        """Let the begun frame grow to `size` bytes, as far as there is data; where the rest of it begins."""
        cdef size_t have = <size_t>len(self.begun)
        cdef size_t end = position
        if have < size:
            end = position + min(size - have, length - position)
            self.begun += whole[<Py_ssize_t>position : <Py_ssize_t>end]
        return end


cdef int add(list runs, const unsigned char *data, Payload *found, payload) except -1:
    """Add the frame whose payload was found in the data."""
    cdef const unsigned char *header = data + found.begin - HEADER
    cdef uint32_t port = little32(header)
    if memcmp(found.digest, header + CHECKSUM, DIGEST) != 0:
        runs.append((port, []))
        return 0
    if runs:
        last_port, payloads = runs[len(runs) - 1]
        if payloads and <uint32_t>last_port == port:
            (<list>payloads).append(payload)
            return 0
    runs.append((port, [payload]))
    return 0


def encode_records(uint32_t port, records, size_t most_bytes):
    """TLS records (RFC 8446 §5.1), each in a frame of its own: frames to send in one go, and how many they are.

    What goes together are MOST_TOGETHER records with at most `most_bytes`, but for a single one. Raises ValueError when
    what is there are no whole records that fit frames.
    """
    cdef Py_buffer buffer
    cdef _Sha256 sha256 = _Sha256()
    cdef Payload payloads[TOGETHER]
    cdef const unsigned char *data
    cdef unsigned char *target
    cdef size_t length, position = 0, end, record, count, index
    cdef bint is_done
    cdef list found = []
    PyObject_GetBuffer(records, &buffer, PyBUF_SIMPLE)
    try:
        data = <const unsigned char *>buffer.buf
        length = <size_t>buffer.len
        while position < length:
            end = position
            count = 0
            while end < length and count < TOGETHER:
                record = record_bytes(data, end, length)
                if count and end + record - position > most_bytes:
                    break
                payloads[count].begin, payloads[count].size = end, record
                end += record
                count += 1
            frames = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(end - position + count * HEADER))
            target = <unsigned char *>PyBytes_AS_STRING(frames)
            with nogil:
                is_done = sha256.of_all(data, payloads, count)
                for index in range(count):
                    put_little32(target, port)
                    put_little32(target + 4, <uint32_t>payloads[index].size)
                    memcpy(target + CHECKSUM, payloads[index].digest, DIGEST)
                    memcpy(target + HEADER, data + payloads[index].begin, payloads[index].size)
                    target += HEADER + payloads[index].size
            if not is_done:
                raise MemoryError("libcrypto could not take a digest")
            found.append((frames, count))
            position = end
        return found
    finally:
        PyBuffer_Release(&buffer)


cdef size_t record_bytes(const unsigned char *data, size_t position, size_t length) except 0:
    """Length of the record at a position, which lies before the end."""
    cdef size_t record
    if length - position < RECORD_HEADER:
        raise ValueError("the last TLS record is cut")
    record = RECORD_HEADER + (<size_t>data[position + 3] << 8 | data[position + 4])
    if record > length - position or record > MOST_PAYLOAD:
        raise ValueError(f"TLS record of {record} bytes is cut or does not fit a frame")
    return record


def new_buffer(size_t size):
    """A buffer to write to, with anything in it: clearing a large one costs as much as filling it."""
    return PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>size)


def encode_pieces(request_id, offset, data, piece_bytes):
    """Part of a download, from its byte `offset` on, as messages of at most `piece_bytes` with their lengths before.

    A message is what protobuf writes for a ProxyIncomingMessages with a DownloadContent. Raises ValueError for numbers
    that make no sense.
    """
    cdef Py_buffer buffer
    cdef const unsigned char *source
    cdef unsigned char *target
    cdef unsigned char *begin
    cdef size_t rest, size, most, head, content
    cdef uint64_t request, at
    if not 0 < piece_bytes <= MOST_PAYLOAD:
        raise ValueError(f"pieces can't have {piece_bytes} bytes")
    most = piece_bytes
    PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    try:
        if not (0 <= request_id <= 0xFFFFFFFFFFFFFFFF and 0 <= offset <= 0xFFFFFFFFFFFFFFFF - buffer.len):
            raise ValueError(f"request {request_id} can't have {buffer.len} bytes at {offset}")
        request, at = request_id, offset
        source = <const unsigned char *>buffer.buf
        rest = <size_t>buffer.len
        size = 0
        while rest:
            content = piece_content(request, at, min(rest, most))
            size += 5 + varint_bytes(content) + content
            at += min(rest, most)
            rest -= min(rest, most)
        encoded = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        begin = target = <unsigned char *>PyBytes_AS_STRING(encoded)
        at = offset
        rest = <size_t>buffer.len
        while rest:
            size = min(rest, most)
            content = piece_content(request, at, size)
            put_little32(target, <uint32_t>(1 + varint_bytes(content) + content))
            target = put_number(target + 4, CONTENT, content)
            target = put_number(target, REQUEST_ID, request)
            target = put_number(target, OFFSET, at)
            target = put_number(target, DATA, size)
            memcpy(target, source, size)
            target += size
            source += size
            at += size
            rest -= size
        assert target - begin == PyBytes_GET_SIZE(encoded)
        return encoded
    finally:
        PyBuffer_Release(&buffer)


cdef size_t piece_content(uint64_t request_id, uint64_t offset, size_t size) noexcept nogil:
    """Bytes of a DownloadContent."""
    return 3 + varint_bytes(request_id) + varint_bytes(offset) + varint_bytes(size) + size


cdef size_t varint_bytes(uint64_t value) noexcept nogil:
    cdef size_t count = 1
    while value > 0x7F:
        value >>= 7
        count += 1
    return count


cdef unsigned char *put_number(unsigned char *target, unsigned char tag, uint64_t value) noexcept nogil:
    """A tag and a number behind it; where the next one goes."""
    target[0] = tag
    target += 1
    while value > 0x7F:
        target[0] = <unsigned char>(value & 0x7F | 0x80)
        target += 1
        value >>= 7
    target[0] = <unsigned char>value
    return target + 1


def join_pieces(list messages not None, size_t most_bytes):
    """What `encode_pieces` made of downloads, back: request, offset and data.

    Pieces of a download that follow one another are joined, up to `most_bytes`. Every other message is given as it is:
    also a DownloadContent that has more than these members, or writes them in another way.
    """
    cdef Piece first, other
    cdef size_t size
    cdef Py_ssize_t index = 0, end, one, count = len(messages)
    cdef unsigned char *target
    cdef list found = []
    while index < count:
        if not find_piece(messages[index], &first):
            found.append(messages[index])
            index += 1
            continue
        size = first.size
        end = index + 1
        while (
            end < count
            and find_piece(messages[end], &other)
            and other.request_id == first.request_id
            and size <= 0xFFFFFFFFFFFFFFFF - first.offset
            and other.offset == first.offset + size
            and size + other.size <= most_bytes
        ):
            size += other.size
            end += 1
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        target = <unsigned char *>PyBytes_AS_STRING(data)
        for one in range(index, end):
            find_piece(messages[one], &other)
            memcpy(target, other.data, other.size)
            target += other.size
        found.append((first.request_id, first.offset, data))
        index = end
    return found


cdef bint find_piece(message, Piece *piece) except -1:
    """Whether a message is a piece and nothing else. Its data lasts as the message does: nobody moves it meanwhile."""
    cdef Py_buffer buffer
    cdef const unsigned char *at
    cdef const unsigned char *end
    cdef uint64_t size
    PyObject_GetBuffer(message, &buffer, PyBUF_SIMPLE)
    at = <const unsigned char *>buffer.buf
    end = at + buffer.len
    PyBuffer_Release(&buffer)
    at = number_after(CONTENT, at, end, &size)
    if at == NULL or size != <uint64_t>(end - at):
        return False
    at = number_after(REQUEST_ID, at, end, &piece.request_id)
    if at != NULL:
        at = number_after(OFFSET, at, end, &piece.offset)
    if at != NULL:
        at = number_after(DATA, at, end, &size)
    if at == NULL or size != <uint64_t>(end - at) or size == 0:
        return False
    piece.data = at
    piece.size = <size_t>size
    return True


cdef const unsigned char *number_after(
    unsigned char tag, const unsigned char *at, const unsigned char *end, uint64_t *value
) noexcept nogil:
    """Read a tag and a number; where the next one is, NULL when there is something else."""
    cdef int shift = 0
    if at == end or at[0] != tag:
        return NULL
    at += 1
    value[0] = 0
    while at != end and shift <= 63:
        if shift == 63 and at[0] > 1:
            return NULL
        value[0] |= <uint64_t>(at[0] & 0x7F) << shift
        shift += 7
        at += 1
        if (at - 1)[0] < 0x80:
            return at
    return NULL
