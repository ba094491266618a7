# First half of _unpack.pyx: from the blob to tar bytes.
#
# One thread reads, hashes and inflates into a ring of slots; another hashes what is in them, while the caller's thread, the
# consumer, parses and writes it. So the three large parts of the work, inflating, the digest of the tar stream and writing,
# are each a thread's, and the kernel spreads them over the cores there are. Every slot is full but the last, so 512-byte
# blocks never cross slots. A fault is seen by the consumer only after it took everything that precedes it.

cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_DStream:
        pass
    ctypedef struct ZSTD_inBuffer:
        const void *src
        size_t size
        size_t pos
    ctypedef struct ZSTD_outBuffer:
        void *dst
        size_t size
        size_t pos
    ctypedef enum ZSTD_dParameter:
        ZSTD_d_windowLogMax
    ZSTD_DStream *ZSTD_createDStream()
    size_t ZSTD_freeDStream(ZSTD_DStream *stream)
    size_t ZSTD_DCtx_setParameter(ZSTD_DStream *stream, ZSTD_dParameter name, int value)
    size_t ZSTD_decompressStream(ZSTD_DStream *stream, ZSTD_outBuffer *output, ZSTD_inBuffer *input)
    unsigned int ZSTD_isError(size_t code)

cdef extern from "<zstd_errors.h>" nogil:
    ctypedef enum ZSTD_ErrorCode:
        ZSTD_error_frameParameter_windowTooLarge
    ZSTD_ErrorCode ZSTD_getErrorCode(size_t code)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    int pthread_cond_destroy(pthread_cond_t *condition)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_SETMASK
    int sigfillset(sigset_t *signals)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *previous)

cdef extern from "<fcntl.h>" nogil:
    int POSIX_FADV_SEQUENTIAL
    int posix_fadvise(int fd, off_t offset, off_t size, int advice)

cdef enum:
    SLOTS = 8
    SLOT_BYTES = 1 << 18  # a multiple of the block size
    INPUT_BYTES = 1 << 17
    THREAD_FROM_BYTES = 1 << 17  # a smaller blob is not worth a thread
    ZSTD_WINDOW_LOG = 24  # RFC 8878 asks for 8 MiB; this is twice that, and half of what an unpacking may take

# How the blob is packed
cdef enum:
    PACKED_NONE
    PACKED_GZIP
    PACKED_ZSTD

cdef struct Slot:
    unsigned char *data
    size_t used

cdef struct Feed:
    int fd
    int packing
    Inflater *inflater
    ZSTD_DStream *zstd
    EVP_MD_CTX *digest  # of the blob
    EVP_MD_CTX *tar_digest  # of the tar stream, which an unpacked blob is itself
    unsigned char *input
    unsigned char *next_input
    size_t available  # input bytes that are not unpacked yet
    bint pending  # the last step filled the slot: there may be more without new input
    bint inside  # a gzip member or a zstd frame
    unsigned long long blob_bytes
    int fault  # what ended the feed, if not the end of the blob: a reason of unpack_types.Code ...
    int error  # ... or an errno
    Slot slots[SLOTS]
    pthread_t thread
    pthread_t hasher
    bint threaded
    bint hashing  # by a thread
    # Below: shared by the threads, changed under the lock
    pthread_mutex_t lock
    pthread_cond_t changed
    unsigned long long filled
    unsigned long long hashed
    unsigned long long taken
    bint finished
    bint stopping


cdef int feed_open(Feed *feed, int fd, int packing) noexcept nogil:
    """Prepares everything but the thread; 0 or an errno. `feed` is zeroed memory; feed_close frees what there is."""
    cdef int index
    pthread_mutex_init(&feed.lock, NULL)
    pthread_cond_init(&feed.changed, NULL)
    feed.fd = fd
    feed.packing = packing
    feed.digest = EVP_MD_CTX_new()
    feed.tar_digest = EVP_MD_CTX_new()
    feed.input = <unsigned char *>malloc(INPUT_BYTES)
    if (
        feed.input == NULL
        or feed.digest == NULL
        or feed.tar_digest == NULL
        or not EVP_DigestInit_ex(feed.digest, EVP_sha256(), NULL)
        or not EVP_DigestInit_ex(feed.tar_digest, EVP_sha256(), NULL)
    ):
        return ENOMEM
    for index in range(SLOTS):
        feed.slots[index].data = <unsigned char *>malloc(SLOT_BYTES)
        if feed.slots[index].data == NULL:
            return ENOMEM
    if packing == PACKED_GZIP:
        feed.inflater = inflater_new()
        if feed.inflater == NULL:
            return ENOMEM
    elif packing == PACKED_ZSTD:
        feed.zstd = ZSTD_createDStream()
        if feed.zstd == NULL or ZSTD_isError(
            ZSTD_DCtx_setParameter(feed.zstd, ZSTD_d_windowLogMax, ZSTD_WINDOW_LOG)
        ):
            return ENOMEM
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL)
    return 0


cdef void feed_start(Feed *feed) noexcept nogil:
    """Starts the threads. What there can be no thread for, the consumer does itself."""
    cdef sigset_t every, previous
    # Signals belong to the threads of the interpreter.
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &previous)
    # Neither starts before it is known whether there is the other.
    pthread_mutex_lock(&feed.lock)
    feed.threaded = pthread_create(&feed.thread, NULL, feed_thread, feed) == 0
    if feed.threaded and feed.packing != PACKED_NONE:
        feed.hashing = pthread_create(&feed.hasher, NULL, hash_thread, feed) == 0
    pthread_mutex_unlock(&feed.lock)
    pthread_sigmask(SIG_SETMASK, &previous, NULL)


cdef void feed_stop(Feed *feed) noexcept nogil:
    """Ends the threads; the digests hold all that was taken."""
    if feed.threaded:
        pthread_mutex_lock(&feed.lock)
        feed.stopping = True
        pthread_cond_broadcast(&feed.changed)
        pthread_mutex_unlock(&feed.lock)
        pthread_join(feed.thread, NULL)
        feed.threaded = False
    if feed.hashing:
        pthread_join(feed.hasher, NULL)
        feed.hashing = False


cdef void feed_close(Feed *feed) noexcept nogil:
    cdef int index
    feed_stop(feed)
    inflater_free(feed.inflater)
    ZSTD_freeDStream(feed.zstd)
    EVP_MD_CTX_free(feed.digest)
    EVP_MD_CTX_free(feed.tar_digest)
    for index in range(SLOTS):
        free(feed.slots[index].data)
    free(feed.input)
    pthread_cond_destroy(&feed.changed)
    pthread_mutex_destroy(&feed.lock)


cdef bint slot_is_free(const Feed *feed) noexcept nogil:
    return feed.filled - feed.taken < SLOTS and (not feed.hashing or feed.filled - feed.hashed < SLOTS)


cdef void *feed_thread(void *argument) noexcept nogil:
    cdef Feed *feed = <Feed *>argument
    cdef bint last = False
    while not last:
        pthread_mutex_lock(&feed.lock)
        while not slot_is_free(feed) and not feed.stopping:
            pthread_cond_wait(&feed.changed, &feed.lock)
        last = feed.stopping
        pthread_mutex_unlock(&feed.lock)
        if last:
            break
        last = fill(feed, &feed.slots[feed.filled % SLOTS])
        pthread_mutex_lock(&feed.lock)
        feed.filled += 1
        feed.finished = last
        pthread_cond_broadcast(&feed.changed)
        pthread_mutex_unlock(&feed.lock)
    return NULL


cdef void *hash_thread(void *argument) noexcept nogil:
    cdef Feed *feed = <Feed *>argument
    cdef bint there
    while True:
        pthread_mutex_lock(&feed.lock)
        # The consumer may stop when it has taken all, while the last slots are not hashed yet.
        while feed.hashed == feed.filled and not feed.finished and not feed.stopping:
            pthread_cond_wait(&feed.changed, &feed.lock)
        there = feed.hashed != feed.filled
        pthread_mutex_unlock(&feed.lock)
        if not there:
            return NULL
        hash_slot(feed, &feed.slots[feed.hashed % SLOTS])
        pthread_mutex_lock(&feed.lock)
        feed.hashed += 1
        pthread_cond_broadcast(&feed.changed)
        pthread_mutex_unlock(&feed.lock)


cdef void hash_slot(Feed *feed, const Slot *slot) noexcept nogil:
    EVP_DigestUpdate(feed.tar_digest, slot.data, slot.used)


cdef Slot *feed_take(Feed *feed) noexcept nogil:
    """The next slot, NULL at the end. It stays valid until feed_release."""
    cdef Slot *slot = &feed.slots[feed.taken % SLOTS]
    cdef bint there
    if feed.threaded:
        pthread_mutex_lock(&feed.lock)
        while feed.filled == feed.taken and not feed.finished:
            pthread_cond_wait(&feed.changed, &feed.lock)
        there = feed.filled != feed.taken
        pthread_mutex_unlock(&feed.lock)
    else:
        there = not feed.finished
        if there:
            feed.finished = fill(feed, slot)
            feed.filled += 1
    if not there:
        return NULL
    if feed.packing != PACKED_NONE and not feed.hashing:
        hash_slot(feed, slot)
    return slot


cdef void feed_release(Feed *feed) noexcept nogil:
    """Gives the slot that was taken last back."""
    if not feed.threaded:
        feed.taken += 1
        return
    pthread_mutex_lock(&feed.lock)
    feed.taken += 1
    pthread_cond_broadcast(&feed.changed)
    pthread_mutex_unlock(&feed.lock)


cdef ssize_t read_blob(Feed *feed, unsigned char *target, size_t size) noexcept nogil:
    """Reads and hashes; 0 at the end, -1 with feed.error set."""
    cdef ssize_t got
    while True:
        got = pread(feed.fd, target, size, <off_t>feed.blob_bytes)
        if got >= 0:
            break
        if errno != EINTR:
            feed.error = errno
            return -1
    feed.blob_bytes += <size_t>got
    EVP_DigestUpdate(feed.digest, target, <size_t>got)
    return got


cdef bint fill(Feed *feed, Slot *slot) noexcept nogil:
    """Fills a slot; true when it is the last one: the blob ended, or feed.fault or feed.error says what happened."""
    cdef ssize_t got
    slot.used = 0
    while slot.used < SLOT_BYTES:
        if feed.packing == PACKED_NONE:
            got = read_blob(feed, slot.data + slot.used, SLOT_BYTES - slot.used)
            if got <= 0:
                return True
            slot.used += <size_t>got
            continue
        if feed.available == 0 and not feed.pending:
            got = read_blob(feed, feed.input, INPUT_BYTES)
            if got <= 0:
                if got == 0 and (feed.inside or feed.blob_bytes == 0):
                    feed.fault = STREAM_TRUNCATED
                return True
            feed.next_input = feed.input
            feed.available = <size_t>got
        if feed.packing == PACKED_GZIP:
            inflate_step(feed, slot)
        else:
            zstd_step(feed, slot)
        if feed.fault or feed.error:
            return True
    return False


cdef void inflate_step(Feed *feed, Slot *slot) noexcept nogil:
    cdef unsigned char *output = slot.data + slot.used
    cdef size_t room = SLOT_BYTES - slot.used
    cdef size_t before = feed.available
    cdef int result
    feed.inside = True
    result = inflater_step(feed.inflater, &feed.next_input, &feed.available, &output, &room)
    feed.pending = room == 0
    if result == INFLATE_MEMBER_END:
        feed.inside = False
        feed.pending = False
    elif result == INFLATE_NO_MEMORY:
        feed.error = ENOMEM
    elif result == INFLATE_CORRUPT or (before and before == feed.available and room == SLOT_BYTES - slot.used):
        feed.fault = STREAM_CORRUPT  # or no way to go on, which must not be an endless one
    slot.used = SLOT_BYTES - room


cdef void zstd_step(Feed *feed, Slot *slot) noexcept nogil:
    cdef ZSTD_inBuffer source
    cdef ZSTD_outBuffer target
    cdef size_t result
    # The library may read formats before 1.0 (their magic numbers start with other bytes), and heeds no limit there.
    if not feed.inside and feed.available and feed.next_input[0] != 0x28 and feed.next_input[0] & 0xF0 != 0x50:
        feed.fault = STREAM_CORRUPT
        return
    source.src = feed.next_input
    source.size = feed.available
    source.pos = 0
    target.dst = slot.data
    target.size = SLOT_BYTES
    target.pos = slot.used
    result = ZSTD_decompressStream(feed.zstd, &target, &source)
    feed.next_input += source.pos
    feed.available -= source.pos
    slot.used = target.pos
    if ZSTD_isError(result):
        if ZSTD_getErrorCode(result) == ZSTD_error_frameParameter_windowTooLarge:
            feed.fault = WINDOW_LIMIT
        else:
            feed.fault = STREAM_CORRUPT
        return
    feed.inside = result != 0
    feed.pending = feed.inside and target.pos == target.size
