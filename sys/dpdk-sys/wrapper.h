/* What the bindings see. Fields in anonymous unions, and what only a macro reaches, have a function here. */
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_version.h>

/* The calling thread's error number. */
static inline int embarcadero_rte_errno(void) { return rte_errno; }

/* The first byte of a packet. */
static inline void *embarcadero_mbuf_data(const struct rte_mbuf *mbuf) { return rte_pktmbuf_mtod(mbuf, void *); }

/* Makes the first bytes of a buffer of one segment its packet. */
static inline void embarcadero_mbuf_set_len(struct rte_mbuf *mbuf, uint16_t len)
{
    rte_pktmbuf_data_len(mbuf) = len;
    rte_pktmbuf_pkt_len(mbuf) = len;
}

/* Bytes in this segment. */
static inline uint16_t embarcadero_mbuf_data_len(const struct rte_mbuf *mbuf) { return rte_pktmbuf_data_len(mbuf); }

/* The segment that follows. */
static inline struct rte_mbuf *embarcadero_mbuf_next(const struct rte_mbuf *mbuf) { return mbuf->next; }

/* What a port said of a packet, and the VLAN tag that it took out. */
static inline uint64_t embarcadero_mbuf_flags(const struct rte_mbuf *mbuf) { return mbuf->ol_flags; }
static inline uint16_t embarcadero_mbuf_vlan_tci(const struct rte_mbuf *mbuf) { return mbuf->vlan_tci; }

/* Flows of UDP, which a port can spread over its queues. */
static inline uint64_t embarcadero_rss_udp(void) { return RTE_ETH_RSS_NONFRAG_IPV4_UDP | RTE_ETH_RSS_NONFRAG_IPV6_UDP; }

/* Bursts: the packets taken from a queue, and those that a queue took. */
static inline uint16_t embarcadero_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count)
{
    return rte_eth_rx_burst(port, queue, mbufs, count);
}
static inline uint16_t embarcadero_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count)
{
    return rte_eth_tx_burst(port, queue, mbufs, count);
}

/* Whether the link is up. */
static inline int embarcadero_link_is_up(uint16_t port)
{
    struct rte_eth_link link = {0};
    return rte_eth_link_get_nowait(port, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
}
