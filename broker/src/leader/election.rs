//! Election: who may claim the next term.

use crate::membership::etcd::Etcd;
use embarcadero_cxl::leadership::{Candidacy, campaign, latest_claim};
use embarcadero_cxl::{Native, Region};
use embarcadero_wire::Term;

/// Brokers whose stores one broker sees, so that it can tell whether another is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CoherenceScope {
    /// All brokers are processes of this host.
    Host,
    /// Brokers run on several hosts, on memory that hardware keeps coherent.
    Fabric,
    /// Brokers run on several hosts, on memory that is not coherent. The region elects nobody.
    None,
}

/// Authority that decides which broker may claim the next term.
pub(crate) enum Election {
    /// Election word of the region. Where brokers do not see each other, the broker that is configured to be the
    /// leader.
    Region,
    /// etcd.
    Etcd(Box<Etcd>),
}

impl Election {
    /// Campaigns for the next term, and returns it if this broker is elected. `before` is the highest candidacy that
    /// this broker saw before it looked at the leader.
    pub(super) async fn elect(&self, region: &Region<Native>, scope: CoherenceScope, before: Term) -> Option<Term> {
        let etcd = match self {
            Self::Region => {
                let term = before.max(latest_claim(region)).next();
                // Where brokers do not see each other's candidacies, only one of them may be the leader.
                let alone = scope == CoherenceScope::None;
                return (alone || campaign(region, Candidacy { term, before })).then_some(term);
            }
            Self::Etcd(etcd) => etcd,
        };
        let term = match etcd.campaign(etcd.elected().ok()).await {
            Ok(elected) => elected?,
            Err(error) => {
                tracing::warn!(%error, "nobody can take over");
                return None;
            }
        };
        let claimed = latest_claim(region);
        if term > claimed {
            return Some(term);
        }
        tracing::error!(%term, %claimed, "etcd was set back to before the region's leaders: delete its keys");
        etcd.set_leads(false).await;
        None
    }

    /// Records whether this broker leads.
    pub(super) async fn set_leads(&self, leads: bool) {
        if let Self::Etcd(etcd) = self {
            etcd.set_leads(leads).await;
        }
    }

    /// Returns true when the leader's entry has been gone from etcd for long, although the leader goes on.
    pub(super) fn has_resigned(&self) -> bool {
        match self {
            Self::Region => false,
            Self::Etcd(etcd) => etcd.lost().is_none() && etcd.elected().is_err_and(|none| none > etcd.grace()),
        }
    }

    /// Checks that somebody can be elected now. Returns the reason if nobody can.
    pub(super) fn can_elect(&self, scope: CoherenceScope) -> Result<(), String> {
        match self {
            Self::Region if scope == CoherenceScope::None => {
                Err("membership: embedded elects nobody on memory that is not coherent".to_owned())
            }
            Self::Region => Ok(()),
            Self::Etcd(etcd) => etcd.lost().map_or(Ok(()), |(_, error)| Err(error)),
        }
    }
}
