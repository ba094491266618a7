# Part of _unpack.pyx: gzip members out of a stream, by isa-l where its header was found at build time (setup.py), else by zlib.
#
# Measured on a Debian root file system: isa-l takes half the time of zlib and a little less than zlib-ng. libdeflate is as
# fast, but wants the whole stream in memory.

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>

    /* What a step came to. */
    enum { INFLATE_MORE, INFLATE_MEMBER_END, INFLATE_CORRUPT, INFLATE_NO_MEMORY };

    #ifdef AOSCORE_ISAL
    #include <isa-l/igzip_lib.h>
    #define INFLATER "isa-l"

    typedef struct {
        struct inflate_state state;
        struct isal_gzip_header header; /* kept: a header may come in pieces */
        unsigned int magic_seen;
        int in_header;
    } Inflater;

    static void inflater_reset(Inflater *inflater)
    {
        isal_inflate_reset(&inflater->state);
        isal_gzip_header_init(&inflater->header);
        inflater->magic_seen = 0;
        inflater->in_header = 1;
    }

    static Inflater *inflater_new(void)
    {
        Inflater *inflater = malloc(sizeof *inflater);
        if (inflater == NULL)
            return NULL;
        isal_inflate_init(&inflater->state);
        inflater->state.crc_flag = ISAL_GZIP_NO_HDR_VER;
        inflater_reset(inflater);
        return inflater;
    }

    static void inflater_free(Inflater *inflater)
    {
        free(inflater);
    }

    /* The library asks for ten bytes before it looks at the first; what is no gzip is to be known as such at once. */
    static int magic_fits(Inflater *inflater, const unsigned char *data, size_t size)
    {
        static const unsigned char magic[] = {0x1f, 0x8b, 8};
        for (; inflater->magic_seen < sizeof magic && size; size--)
            if (*data++ != magic[inflater->magic_seen++])
                return 0;
        return 1;
    }

    static int inflater_step(Inflater *inflater, unsigned char **in, size_t *in_size, unsigned char **out, size_t *out_size)
    {
        struct inflate_state *state = &inflater->state;
        int result = ISAL_DECOMP_OK;
        if (inflater->in_header && !magic_fits(inflater, *in, *in_size))
            return INFLATE_CORRUPT;
        state->next_in = *in;
        state->avail_in = (uint32_t)*in_size;
        state->next_out = *out;
        state->avail_out = (uint32_t)*out_size;
        if (inflater->in_header) {
            result = isal_read_gzip_header(state, &inflater->header);
            if (result == ISAL_DECOMP_OK) {
                inflater->in_header = 0;
                if (inflater->header.flags & 0xe0) /* reserved */
                    return INFLATE_CORRUPT;
            }
        }
        if (!inflater->in_header)
            result = isal_inflate(state);
        *in = state->next_in;
        *in_size = state->avail_in;
        *out = state->next_out;
        *out_size = state->avail_out;
        if (result < 0)
            return INFLATE_CORRUPT;
        if (inflater->in_header || state->block_state != ISAL_BLOCK_FINISH)
            return INFLATE_MORE;
        inflater_reset(inflater);
        return INFLATE_MEMBER_END;
    }

    #else
    #include <zlib.h>
    #define INFLATER "zlib"

    typedef z_stream Inflater;

    static Inflater *inflater_new(void)
    {
        Inflater *inflater = calloc(1, sizeof *inflater);
        if (inflater != NULL && inflateInit2(inflater, 16 + MAX_WBITS) != Z_OK) {
            free(inflater);
            return NULL;
        }
        return inflater;
    }

    static void inflater_free(Inflater *inflater)
    {
        if (inflater != NULL)
            inflateEnd(inflater);
        free(inflater);
    }

    static int inflater_step(Inflater *inflater, unsigned char **in, size_t *in_size, unsigned char **out, size_t *out_size)
    {
        int result;
        inflater->next_in = *in;
        inflater->avail_in = (unsigned int)*in_size;
        inflater->next_out = *out;
        inflater->avail_out = (unsigned int)*out_size;
        result = inflate(inflater, Z_NO_FLUSH);
        *in = inflater->next_in;
        *in_size = inflater->avail_in;
        *out = inflater->next_out;
        *out_size = inflater->avail_out;
        if (result == Z_MEM_ERROR)
            return INFLATE_NO_MEMORY;
        if (result == Z_STREAM_END) {
            inflateReset(inflater);
            return INFLATE_MEMBER_END;
        }
        return result == Z_OK || result == Z_BUF_ERROR ? INFLATE_MORE : INFLATE_CORRUPT;
    }
    #endif
    """
    ctypedef struct Inflater:
        pass
    int INFLATE_MEMBER_END
    int INFLATE_CORRUPT
    int INFLATE_NO_MEMORY
    const char *INFLATER
    Inflater *inflater_new() nogil
    void inflater_free(Inflater *inflater) nogil
    # A step takes from the input and gives to the output, and moves both on; it ends where a member ends. A new member may follow.
    int inflater_step(
        Inflater *inflater, unsigned char **data, size_t *size, unsigned char **output, size_t *output_size
    ) nogil
