# Second part of _unpack.pyx: fields of tar and pax headers. Functions return 0, or the reason of unpack_types.Code.

cdef enum:
    BLOCK = 512
    MAX_NAME = 4095
    MAX_COMPONENT = 255
    MAX_DEPTH = 256
    MAX_EXTENDED = 1 << 20
    MAX_EXTENTS = 1 << 17

cdef struct Text:
    char *data  # NULL: not there
    size_t size

cdef struct Extent:
    long long offset
    long long size

cdef struct Extents:
    Extent *items
    size_t count
    size_t room

cdef struct Attribute:
    const char *name
    Text value

cdef struct Attributes:
    Attribute *items
    size_t count
    size_t room

# What GNU long names and a pax header say about the next member
cdef struct Extended:
    Text long_name
    Text long_link
    bint pax
    Text path
    Text linkpath
    bint has_size
    bint has_uid
    bint has_gid
    bint has_mtime
    bint sparse
    bint sparse_version_1
    bint has_sparse_size
    bint has_sparse_offset
    long long size
    long long uid
    long long gid
    long long seconds
    long long sparse_size
    long long sparse_offset
    Text sparse_name
    int nanoseconds
    unsigned long long skipped_attributes


cdef Text text_of(const unsigned char *data, size_t size) noexcept nogil:
    """Text up to the first NUL."""
    cdef Text text
    cdef const void *end = memchr(data, 0, size)
    text.data = <char *>data
    text.size = size if end == NULL else <size_t>(<const unsigned char *>end - data)
    return text


cdef bint is_key(const Text *text, const char *name) noexcept nogil:
    cdef size_t size = strlen(name)
    return text.size == size and memcmp(text.data, name, size) == 0


cdef bint has_prefix(const char *data, size_t size, const char *prefix) noexcept nogil:
    cdef size_t length = strlen(prefix)
    return size >= length and memcmp(data, prefix, length) == 0


cdef int read_number(const unsigned char *data, size_t size, long long *value) noexcept nogil:
    """A numeric field: octal digits, or base-256 when the first bit is set; NUMBER when neither fits."""
    cdef size_t index = 0
    cdef long long result
    if data[0] & 0x80:
        result = <long long>(data[0] & 0x3F) - (64 if data[0] & 0x40 else 0)
        for index in range(1, size):
            if result > (LLONG_MAX >> 8) or result < -(LLONG_MAX >> 8) - 1:
                return NUMBER
            result = result * 256 + data[index]
        value[0] = result
        return 0
    result = 0
    while index < size and data[index] == c" ":
        index += 1
    while index < size and data[index] != c" " and data[index] != 0:
        if data[index] < c"0" or data[index] > c"7":
            return NUMBER
        result = result * 8 + (data[index] - c"0")
        index += 1
    value[0] = result
    return 0


cdef bint checksum_fits(const unsigned char *block) noexcept nogil:
    """Old writers added signed characters."""
    cdef long long stated = 0
    cdef long unsigned_sum = 0, signed_sum = 0
    cdef int index
    if read_number(block + 148, 8, &stated):
        return False
    for index in range(BLOCK):
        unsigned_sum += block[index]
        signed_sum += <signed char>block[index]
    for index in range(148, 156):
        unsigned_sum += 32 - block[index]
        signed_sum += 32 - <signed char>block[index]
    return stated == unsigned_sum or stated == signed_sum


cdef bint is_zero(const unsigned char *block) noexcept nogil:
    cdef int index
    for index in range(BLOCK):
        if block[index]:
            return False
    return True


cdef int read_decimal(const char *data, size_t size, long long *value) noexcept nogil:
    """1 to 19 digits and nothing else."""
    cdef long long result = 0
    cdef int digit
    cdef size_t index
    if size == 0 or size > 19:
        return EXTENDED_HEADER
    for index in range(size):
        if data[index] < c"0" or data[index] > c"9":
            return EXTENDED_HEADER
        digit = data[index] - c"0"
        if result > (LLONG_MAX - digit) // 10:
            return EXTENDED_HEADER
        result = result * 10 + digit
    value[0] = result
    return 0


cdef int read_time(const Text *text, long long *seconds, int *nanoseconds) noexcept nogil:
    """Seconds and nanoseconds of a pax time such as "-1.5"."""
    cdef const char *data = text.data
    cdef size_t size = text.size, whole = 0, index
    cdef bint negative = size > 0 and data[0] == c"-"
    cdef int fraction = 0, scale = 100000000
    if negative:
        data += 1
        size -= 1
    while whole < size and data[whole] != c".":
        whole += 1
    if whole > 18 or read_decimal(data, whole, seconds):
        return EXTENDED_HEADER
    for index in range(whole + 1, size):
        if data[index] < c"0" or data[index] > c"9":
            return EXTENDED_HEADER
        fraction += (data[index] - c"0") * scale
        scale //= 10
    if negative:
        seconds[0] = -seconds[0]
        if fraction:
            seconds[0] -= 1
            fraction = 1000000000 - fraction
    nanoseconds[0] = fraction
    return 0


cdef int next_record(char **data, size_t *size, Text *key, Text *value) noexcept nogil:
    """Takes one record "<length> <key>=<value>\\n" of a pax header; key and value become NUL-terminated in place."""
    cdef size_t digits = 0, length = 0
    cdef char *equals
    while digits < size[0] and digits < 8 and c"0" <= data[0][digits] <= c"9":
        length = length * 10 + <size_t>(data[0][digits] - c"0")
        digits += 1
    if digits == 0 or digits == 8 or digits == size[0] or data[0][digits] != c" ":
        return EXTENDED_HEADER
    if length > size[0] or length < digits + 2 or data[0][length - 1] != c"\n":
        return EXTENDED_HEADER
    key.data = data[0] + digits + 1
    equals = <char *>memchr(key.data, c"=", length - digits - 2)
    if equals == NULL or equals == key.data:
        return EXTENDED_HEADER
    key.size = <size_t>(equals - key.data)
    value.data = equals + 1
    value.size = length - digits - 1 - key.size - 2
    equals[0] = 0
    data[0][length - 1] = 0
    data[0] += length
    size[0] -= length
    return 0


cdef int add_extent(Extents *extents, long long offset, long long size) noexcept nogil:
    """0, a reason, or -ENOMEM."""
    cdef Extent *larger
    if extents.count >= MAX_EXTENTS:
        return EXTENT_LIMIT
    if extents.count == extents.room:
        larger = <Extent *>realloc(extents.items, (extents.room * 2 + 64) * sizeof(Extent))
        if larger == NULL:
            return -ENOMEM
        extents.items = larger
        extents.room = extents.room * 2 + 64
    extents.items[extents.count].offset = offset
    extents.items[extents.count].size = size
    extents.count += 1
    return 0


cdef int add_attribute(Attributes *attributes, const char *name, Text value) noexcept nogil:
    cdef Attribute *larger
    if attributes.count == attributes.room:
        larger = <Attribute *>realloc(attributes.items, (attributes.room * 2 + 16) * sizeof(Attribute))
        if larger == NULL:
            return -ENOMEM
        attributes.items = larger
        attributes.room = attributes.room * 2 + 16
    attributes.items[attributes.count].name = name
    attributes.items[attributes.count].value = value
    attributes.count += 1
    return 0


cdef bint is_understood(const Text *key) noexcept nogil:
    return (
        is_key(key, b"path")
        or is_key(key, b"linkpath")
        or is_key(key, b"size")
        or is_key(key, b"uid")
        or is_key(key, b"gid")
        or is_key(key, b"mtime")
        or has_prefix(key.data, key.size, b"SCHILY.xattr.")
        or has_prefix(key.data, key.size, b"GNU.sparse.")
    )


cdef int read_global(char *data, size_t size) noexcept nogil:
    cdef Text key, value
    cdef int reason
    while size:
        reason = next_record(&data, &size, &key, &value)
        if reason:
            return reason
        if is_understood(&key):
            return GLOBAL_HEADER
    return 0


cdef Text text_or_none(const Text *value) noexcept nogil:
    cdef Text text
    text.data = value.data if value.size else NULL
    text.size = value.size
    return text


cdef int optional_decimal(const Text *text, bint *there, long long *value) noexcept nogil:
    """An empty value takes back what was said before."""
    there[0] = text.size > 0
    return read_decimal(text.data, text.size, value) if there[0] else 0


cdef int read_pax(
    Extended *extended, Extents *extents, Attributes *attributes, char *data, size_t size
) noexcept nogil:
    cdef Text key, value
    cdef int reason
    extended.pax = True
    while size:
        reason = next_record(&data, &size, &key, &value)
        if reason == 0:
            reason = apply_record(extended, extents, attributes, &key, &value)
        if reason:
            return reason
    return 0


cdef int apply_record(
    Extended *extended, Extents *extents, Attributes *attributes, Text *key, Text *value
) noexcept nogil:
    if is_key(key, b"path"):
        extended.path = text_or_none(value)
    elif is_key(key, b"linkpath"):
        extended.linkpath = text_or_none(value)
    elif is_key(key, b"size"):
        return optional_decimal(value, &extended.has_size, &extended.size)
    elif is_key(key, b"uid"):
        return optional_decimal(value, &extended.has_uid, &extended.uid)
    elif is_key(key, b"gid"):
        return optional_decimal(value, &extended.has_gid, &extended.gid)
    elif is_key(key, b"mtime"):
        extended.has_mtime = value.size > 0
        if extended.has_mtime:
            return read_time(value, &extended.seconds, &extended.nanoseconds)
    elif has_prefix(key.data, key.size, b"SCHILY.xattr."):
        return apply_attribute(extended, attributes, key, value)
    elif has_prefix(key.data, key.size, b"GNU.sparse."):
        key.data += 11
        key.size -= 11
        return apply_sparse(extended, extents, key, value)
    return 0


cdef int apply_attribute(Extended *extended, Attributes *attributes, Text *key, Text *value) noexcept nogil:
    """Attributes of other name spaces steer the host (overlay, labels, signatures) and are not the layer's to set."""
    cdef const char *name = key.data + 13
    cdef size_t size = key.size - 13
    if memchr(key.data, 0, key.size) != NULL:
        return EXTENDED_HEADER
    if (size == 19 and memcmp(name, b"security.capability", 19) == 0) or (
        has_prefix(name, size, b"user.") and not has_prefix(name, size, b"user.overlay.")
    ):
        return add_attribute(attributes, name, value[0])
    extended.skipped_attributes += 1
    return 0


cdef int apply_sparse(Extended *extended, Extents *extents, Text *key, Text *value) noexcept nogil:
    """GNU tar describes sparse files in three ways: 0.0 offset/numbytes pairs, 0.1 map, 1.0 map in the data."""
    cdef long long number = 0
    cdef int reason = 0
    extended.sparse = True
    if is_key(key, b"major"):
        reason = read_decimal(value.data, value.size, &number)
        extended.sparse_version_1 = number == 1
    elif is_key(key, b"size") or is_key(key, b"realsize"):
        reason = read_decimal(value.data, value.size, &extended.sparse_size)
        extended.has_sparse_size = True
    elif is_key(key, b"name"):
        extended.sparse_name = text_or_none(value)
    elif is_key(key, b"offset"):
        reason = read_decimal(value.data, value.size, &extended.sparse_offset)
        extended.has_sparse_offset = True
    elif is_key(key, b"numbytes"):
        if not extended.has_sparse_offset:
            return SPARSE_MAP
        reason = read_decimal(value.data, value.size, &number)
        if reason == 0:
            reason = add_extent(extents, extended.sparse_offset, number)
        extended.has_sparse_offset = False
    elif is_key(key, b"map"):
        reason = read_sparse_map(extents, value)
    return reason


cdef int read_sparse_map(Extents *extents, const Text *value) noexcept nogil:
    """offset,size,offset,size,..."""
    cdef const char *at = value.data
    cdef const char *end = value.data + value.size
    cdef const char *comma
    cdef const char *stop
    cdef long long numbers[2]
    cdef int reason, index = 0
    cdef size_t words = 1
    if value.size == 0:
        return 0
    comma = at
    while comma < end:
        words += comma[0] == c","
        comma += 1
    if words % 2:
        return SPARSE_MAP
    while words:
        comma = <const char *>memchr(at, c",", <size_t>(end - at))
        stop = end
        if comma != NULL:
            stop = comma
        reason = read_decimal(at, <size_t>(stop - at), &numbers[index])
        if reason == 0 and index == 1:
            reason = add_extent(extents, numbers[0], numbers[1])
        if reason:
            return reason
        index = 1 - index
        at = stop + 1
        words -= 1
    return 0


cdef int check_name(const Text *raw, bint translate, char *path, size_t *length, size_t *base) noexcept nogil:
    """Checks a member's name and writes its parts to `path` (MAX_NAME + 1 bytes), joined by single slashes.

    length: of the path; 0 stands for the root itself. base: where its last part starts.
    """
    cdef size_t index = 0, start, size, written = 0, depth = 0
    if raw.size == 0:
        return NAME_EMPTY
    if memchr(raw.data, 0, raw.size) != NULL:
        return NAME_NUL
    if raw.size > MAX_NAME:
        return NAME_TOO_LONG
    # A lone slash is the root itself to umoci, and leads nowhere else.
    while index < raw.size and raw.data[index] == c"/":
        index += 1
    if index and index < raw.size:
        return NAME_ABSOLUTE
    index = 0
    base[0] = 0
    while index < raw.size:
        start = index
        while index < raw.size and raw.data[index] != c"/":
            index += 1
        size = index - start
        index += 1
        if size == 0 or (size == 1 and raw.data[start] == c"."):
            continue
        if size == 2 and raw.data[start] == c"." and raw.data[start + 1] == c".":
            return NAME_DOTDOT
        if size > MAX_COMPONENT or depth == MAX_DEPTH:
            return NAME_TOO_LONG
        depth += 1
        if written:
            path[written] = c"/"
            written += 1
        base[0] = written
        memcpy(path + written, raw.data + start, size)
        written += size
    path[written] = 0
    length[0] = written
    if translate and has_reserved_parent(path, base[0]):
        return NAME_RESERVED
    return 0


cdef bint has_reserved_parent(const char *path, size_t base) noexcept nogil:
    cdef size_t index
    for index in range(base):
        if (index == 0 or path[index - 1] == c"/") and has_prefix(path + index, base - index, b".wh."):
            return True
    return False
